"""Do the paper's claims hold? A runner for studies on real models and data: ``python -m experiments --help``."""
