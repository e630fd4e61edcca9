"""A cluster under virtual time: the product's own policies, pools and index, with formulas in place of engines."""
