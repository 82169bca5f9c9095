"""The parts of the method: options, factors, their sharing, rank-one experts, tau. functional.py has the formulas."""
