"""HOW WE KNOW: statistics, and a judge that answers lettered questions in both orders."""
