"""What is in my rows?"""
