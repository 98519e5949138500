"""The engine behind every cache: when to compute (policy), what to reuse (site), how to guess it (guess).

A technique of this family is a preset: it names a site, makes a policy for each request and a guess; `Runner` does
the rest, in one place for all: it knows the request, step and guidance branch, computes whenever anything is
unexpected, keeps what was computed, and counts.
"""
