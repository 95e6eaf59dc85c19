"""The studies behind the REPORT: what is compared there, and what draws its figures."""
