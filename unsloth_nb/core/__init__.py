"""What may everyone use?"""
