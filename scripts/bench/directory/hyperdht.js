// hyperdht's testnet under the same work as workload.py gives the others: argv[2] is the plan, argv[3] 'newest' or 'first'; JSON on stdout.
// A key is a key pair; its value is signed, as our records are. 'newest' hears all holders out (the default), timed as `whole`; 'first' takes
// the first answer, timed as `get`.
'use strict'

const createTestnet = require('hyperdht/testnet')
const DHT = require('hyperdht')
const crypto = require('crypto')

const plan = JSON.parse(process.argv[2])
const latest = process.argv[3] === 'newest'

// mulberry32: a small seeded generator
let state = plan.seed
function random () {
  state = (state + 0x6d2b79f5) | 0
  let t = Math.imul(state ^ (state >>> 15), 1 | state)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296
}
const choice = (list) => list[Math.floor(random() * list.length)]
function shuffle (list) {
  for (let at = list.length - 1; at > 0; at--) {
    const other = Math.floor(random() * (at + 1));
    [list[at], list[other]] = [list[other], list[at]]
  }
  return list
}

async function runAll (operations) {
  const found = {}
  const until = performance.now() + plan.budget_s * 1e3
  let next = 0
  async function lane () {
    while (next < operations.length && performance.now() < until) {
      const { kind, run } = operations[next++]
      const began = performance.now()
      const cpu = process.cpuUsage()
      let timer
      const late = new Promise((resolve) => { timer = setTimeout(resolve, plan.limit_s * 1e3, false) })
      const ok = await Promise.race([run().catch(() => false), late])
      clearTimeout(timer)
      const samples = (found[kind] ||= { ms: [], cpu_ms: [], ok: 0 })
      const used = process.cpuUsage(cpu)
      samples.ms.push(performance.now() - began)
      samples.cpu_ms.push((used.user + used.system) / 1e3)
      samples.ok += ok ? 1 : 0
    }
  }
  await Promise.all(Array.from({ length: plan.concurrency }, lane))
  return found
}

async function main () {
  const began = performance.now()
  const testnet = await createTestnet(plan.nodes)
  const nodes = [...testnet.nodes]
  const upS = (performance.now() - began) / 1e3
  await new Promise((resolve) => setTimeout(resolve, plan.settle_s * 1e3))

  const kept = new Map() // key → owner, key pair, value
  function stores (alive, first) {
    const turns = shuffle([...alive])
    return Array.from({ length: plan.ops }, (_, at) => {
      const key = first + at
      const entry = { owner: turns[key % turns.length], pair: DHT.keyPair(), value: crypto.randomBytes(plan.value_bytes) }
      kept.set(key, entry)
      return {
        kind: 'store',
        run: async () => {
          const put = await nodes[entry.owner].mutablePut(entry.pair, entry.value)
          return put.closestNodes.length > 0
        }
      }
    })
  }
  function gets (alive, keys) {
    return Array.from({ length: plan.ops }, () => {
      const entry = kept.get(choice(keys))
      const asker = choice(alive.filter((node) => node !== entry.owner))
      return {
        kind: latest ? 'whole' : 'get',
        run: async () => {
          const got = await nodes[asker].mutableGet(entry.pair.publicKey, { latest })
          return got !== null && Buffer.compare(got.value, entry.value) === 0
        }
      }
    })
  }

  async function runOneKind (operations) {
    const before = process.cpuUsage()
    const found = await runAll(operations)
    const used = process.cpuUsage(before)
    for (const samples of Object.values(found)) samples.cpu_ms_each = (used.user + used.system) / 1e3 / samples.ms.length
    return found
  }

  const all = [...nodes.keys()]
  const healthy = await runOneKind(stores(all, 0))
  const stored = [...Array(healthy.store.ms.length).keys()]
  Object.assign(healthy, await runOneKind(gets(all, stored)))

  const victims = shuffle(all.slice(1)).slice(0, Math.round(plan.dead * plan.nodes))
  const gone = new Set(victims)
  const alive = all.filter((node) => !gone.has(node))
  const lasting = stored.filter((key) => !gone.has(kept.get(key).owner))
  const mixed = shuffle([...gets(alive, lasting), ...stores(alive, plan.ops)])
  await Promise.all(victims.map((node) => nodes[node].destroy({ force: true })))
  const dead = await runAll(mixed)

  const version = require('hyperdht/package.json').version
  console.log(JSON.stringify({ name: `hyperdht ${version} (${process.argv[3]})`, nodes: plan.nodes, up_s: upS, healthy, dead }))
  process.exit(0)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
