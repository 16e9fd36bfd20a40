"""All collectives, and the only contact with DeepSpeed and Accelerate."""
