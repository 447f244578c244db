"""Small experiments on real images that support the paper's claims: the demo and the study."""
