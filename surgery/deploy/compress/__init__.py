"""From a trained model, data and a budget to a student: carve, compensate, recover."""
