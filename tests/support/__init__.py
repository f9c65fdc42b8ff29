"""What tests share: cases, slow oracles, stand-ins, made-up datasets.

Fixtures of pytest (`monkeypatch`, `capfd`) and of the conftest.py files that return functions carry no annotation in a
test: their docstrings say what they are.
"""
