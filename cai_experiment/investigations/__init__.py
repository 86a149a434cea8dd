"""A model investigates a question over several turns, under several conditions; the code that it writes runs apart."""
