"""The paper's tables and figures: train each system, generate, evaluate, and lay the rows out."""
