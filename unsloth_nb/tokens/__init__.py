"""What does the loss see?"""
