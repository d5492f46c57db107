"""The documentation's site: what of it is made from the code."""
