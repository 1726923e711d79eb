"""The detection benchmark: small real trainings, faulty and healthy, judged by the rules of a pack.

python -m benchmarks.detection            # train what is not there yet, judge, print and write the report
"""
