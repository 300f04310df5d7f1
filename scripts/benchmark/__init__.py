"""`make benchmark`: what training costs beside its arithmetic limit and beside other implementations."""
