"""Applications are built on `utils`, for one script each. Only `paper` imports another one, `attack`."""
