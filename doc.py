import json, time, cProfile, pstats
from moe_fair.core.plan import Plan
p=time.process_time
t=p(); import moe_fair.report.vision as rv; print("import", p()-t)
plans=[Plan.load("out-laps/moe_fair/plan.json")]; result=json.load(open("out-laps/moe_fair/result.json"))
t=p(); import matplotlib.pyplot; print("pyplot", p()-t)
t=p(); rv.document(plans,result); print("doc", p()-t)
t=p(); rv.document(plans,result); print("doc again", p()-t)
pr=cProfile.Profile(p); pr.enable(); rv.document(plans,result); pr.disable(); pstats.Stats(pr).sort_stats("cumulative").print_stats(30)
