"""Loss terms as pure functions of local tensors; each returns a value per token or per row, never a mean.

The caller sums and divides by counts over all ranks, so a mean is the same on any number of them. All compute in
float32, or float64 when given float64, whatever the input type.
"""
