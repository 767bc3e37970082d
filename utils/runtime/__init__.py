"""The runtime wing is the machinery of the stages: flags, names of files, resumable passes, processes.

Only artifacts.py, flags.py, layers.py, settings.py and stages.py know what the stages are about. Nothing here
imports the rest of `utils`.
"""
