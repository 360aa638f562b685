"""How studies measure: a module for each that needs more than its own page of code, and what they share."""
