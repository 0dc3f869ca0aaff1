"""What is wrong in files that I only read?"""
