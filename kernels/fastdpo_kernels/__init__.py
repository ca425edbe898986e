"""Hand-written kernels behind fastdpo; imports torch, triton and sympy only."""
