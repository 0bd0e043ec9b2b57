"""What is compiled by numba, and what compiled code is made of."""
