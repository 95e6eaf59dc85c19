"""The studies behind the REPORT: its comparisons, and the code that draws its figures."""
