"""Steps that replace matrices by products of smaller ones.

factor_step   `lower_factor`: fewer columns of E, and its keys
factor        the product that costs least
"""
