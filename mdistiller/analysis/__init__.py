"""What is read off trained models and recorded runs."""
