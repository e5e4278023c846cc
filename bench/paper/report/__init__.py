"""What the records say: verdict, figures, and one page with both."""
