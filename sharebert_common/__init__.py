"""The ground floor: errors, files, recipes and counter-based random numbers. It imports no other package."""
