"""Blind listening tests: what is played to whom, the page, the ratings, their summary."""
