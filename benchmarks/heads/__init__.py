"""Do the defaults of the heads hold on data that is hard for them?"""
