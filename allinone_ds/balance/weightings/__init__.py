"""From a small record of an optimizer step to one factor per task.

May import nothing but its own modules and the bottom of the package.
"""
