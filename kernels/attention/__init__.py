"""Softmax attention that never holds the matrix of scores, its log-sum-exp, and the exact merge of two key sets."""
