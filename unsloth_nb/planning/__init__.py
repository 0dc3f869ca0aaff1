"""What fits, and how fast?"""
