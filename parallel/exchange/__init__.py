"""The exchanges that carry state between the ranks of a sequence."""
