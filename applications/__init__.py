"""What is built on `utils` and used by one script each. Only `paper` imports another application,
`attack`.
"""
