"""Inference in a secretly rotated basis (ConjFormer, arXiv 2606.16461): conversion, secrets, client, attacks."""
