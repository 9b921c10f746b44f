"""Convolution by learned Monarch transforms: two small matrices and a table in place of each Fourier transform."""
