"""Exports where people serve them: the fingerprint of an export, and what a server makes of it.

Reads the folders of exports only; nothing here knows of runs, recipes or the method.
"""
