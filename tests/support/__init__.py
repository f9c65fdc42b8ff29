"""What tests share: cases, slow oracles, stand-ins, made-up datasets."""
