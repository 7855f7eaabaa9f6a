import time, pytest, tiny
def test_x(actors, policy):
    for ranks, zero, packed, dynamic in [(1,2,False,False),(1,2,True,False),(1,3,True,True),(2,2,False,False),(2,3,True,True)]:
        opts=["--ds.zero_stage", zero]+(["--train.dynamic_batch_enable"] if dynamic else [])
        t=time.time()
        a=tiny.trained(actors, tiny.arguments(policy,*opts,ranks=ranks,packed=packed))
        t1=time.time()
        b=tiny.trained(actors, tiny.arguments(policy,*opts,ranks=ranks,packed=packed,recipe="full"))
        t2=time.time()
        print(ranks,zero,packed,dynamic, t1-t,t2-t1, a[0][0]["actor_grad_norm"],b[0][0]["actor_grad_norm"],a[0][0]["policy_loss"], max((a[1][0][k]-b[1][0][k]).abs().max().item() for k in a[1][0]))
        c=tiny.trained(actors, tiny.arguments(policy,*opts,ranks=ranks,packed=packed,recipe="low2high"))
        print(c[0])
