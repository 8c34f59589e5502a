"""The method's claims put to the test on a policy: what α stands for, and where entropy goes."""
