"""What examples/end_to_end.py needs beside the steps themselves: data, scores, checks and the report."""
