"""Networks: built by name, fitted with a head, filled with weights, saved and opened again."""
