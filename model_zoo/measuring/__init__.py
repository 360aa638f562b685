"""How studies measure what they show: a module for each that needs more than its own page of code."""
