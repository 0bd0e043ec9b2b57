"""What only a CPU runs, one module an operation: compiled loops over rows and tiles, on the threads of torch's OpenMP.

Reached by way of the operators of `fastpmae_kernels` alone, and not at all within `backend.use("ref")`.
"""
