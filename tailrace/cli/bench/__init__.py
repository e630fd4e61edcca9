"""`tailrace bench`: what this machine does, in figures that anyone can measure again."""
