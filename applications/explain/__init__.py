"""Explain one decision: the neurons, heads and patches that brought a score about, and the proof.

question.py reads what is asked: texts, pictures, what a neuron does where it is taken away. answer.py finds
the neurons and takes them away; known.py says what is known of a neuron. words.py says an answer in
sentences, table.py prints it, page.py draws the page, write.py names and writes it.
"""
