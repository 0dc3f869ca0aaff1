"""What do others get?"""
