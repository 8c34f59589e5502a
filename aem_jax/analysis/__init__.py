"""Tests of the method's claims on a policy: α as a proxy of surprisal, and the drift of response entropy."""
