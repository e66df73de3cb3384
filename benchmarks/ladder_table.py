def print_report(records, blocks):
    pass


def write_plots(records, folder):
    pass
