"""`wsurg demo`: a backdoor planted in a real model, found, and taken out."""
